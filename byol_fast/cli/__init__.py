"""The commands of `byol-fast`: `main` finds them, each other module is one."""
