"""The prompt pool: what is known of each prompt, which ones a run draws, and the file that keeps it between runs."""
