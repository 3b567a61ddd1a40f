"""Tasks whose answers a program can check, each as prompts, as a reward and as an evaluation. Import a module by its name."""
