"""Trains small random-config versions of public model classes in every precision, and says which come out right."""
