"""libvirt's XML to and from the model. XML exists nowhere else."""
