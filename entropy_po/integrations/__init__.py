"""Other people's trainers and models on this library's operators; each module needs what it is named after, and no more."""
