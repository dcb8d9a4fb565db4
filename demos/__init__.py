"""What lies on disk and how it becomes episodes: one small file per format."""
