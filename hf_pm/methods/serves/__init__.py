"""How the result of a method is run, one file a way."""
