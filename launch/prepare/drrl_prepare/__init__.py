"""What launch/prepare/prepare.py is made of."""
