"""What all routes share: state, access, bodies, problems."""
