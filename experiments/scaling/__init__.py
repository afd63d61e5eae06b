"""What do more experts buy at equal FLOPs?"""
