"""What a server counts, kept in memory that outlives its workers, and the port that shows it.

`store` holds the numbers, `families` names them, `collector` turns them into Prometheus's formats, `http` serves those.
"""
