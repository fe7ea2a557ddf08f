"""What every script needs: command lines, files, processes, reports, significance."""
