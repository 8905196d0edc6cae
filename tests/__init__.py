"""The tests, in the rooms of the package; what several files share lies beside this file."""
