"""Images as integers from folders, Hub data sets and streams: each image is used once or rejected with a reason."""
