"""The methods, one folder each; recipes never import each other."""
