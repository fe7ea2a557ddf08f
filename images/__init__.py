"""Images: from files and downloads, in augmented batches."""
