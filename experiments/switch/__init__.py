"""Which choices of the Switch Transformer matter, and which keep training stable?"""
