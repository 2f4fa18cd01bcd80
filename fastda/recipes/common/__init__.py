"""What the trainings share: images from files, checkpoints, report pages."""
