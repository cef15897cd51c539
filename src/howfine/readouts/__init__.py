"""One file a readout; the folder is the registry (see `howfine.readout`)."""
