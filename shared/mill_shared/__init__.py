"""What every job needs; knows no recipe and no Kubernetes."""
