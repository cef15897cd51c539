"""One file a method; the folder is the registry (see `howfine.method`)."""
