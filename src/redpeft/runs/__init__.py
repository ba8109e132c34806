"""Many runs: a list of jobs, resumed where they were left."""
