"""Labels that were made elsewhere, as the records of a run: from there on everything works as if labelled here."""
