"""What is measured of systems."""
