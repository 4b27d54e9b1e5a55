"""What comes in: the RPCs and HTTP endpoints of the service. They translate, nothing else."""
