"""Share models on the Hub: uploads, the model card, and code for users without this package."""
