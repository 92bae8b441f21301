"""What processes of one group say to each other about training steps."""
