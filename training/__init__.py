"""What hangs on a run and on what it trained."""
