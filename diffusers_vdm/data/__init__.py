"""Images as integers: folders, data sets of the Hub, streams; every image once, or a refusal that says why."""
