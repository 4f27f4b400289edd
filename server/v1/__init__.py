"""The HTTP interface of this project."""
