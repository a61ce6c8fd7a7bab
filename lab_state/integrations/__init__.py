"""lab_state in other people's frameworks: one module each, which imports that framework alone."""
