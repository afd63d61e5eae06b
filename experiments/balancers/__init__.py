"""Which way to balance experts gives the better model at equal operations?"""
