"""What happens to an update: the table of methods and the parts they are made of."""
