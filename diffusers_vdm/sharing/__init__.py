"""Sharing on the Hub: uploads, the model card, and code for those who do not have this package."""
