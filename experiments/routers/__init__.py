"""Which way to choose experts gives the better model at equal parameters?"""
