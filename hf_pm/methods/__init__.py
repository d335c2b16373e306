"""The table of methods, and the parts that methods are made of."""
