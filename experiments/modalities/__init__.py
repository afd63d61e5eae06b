"""Images and text in one sequence: shared experts, or experts of each modality?"""
