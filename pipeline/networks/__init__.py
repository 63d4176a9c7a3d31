"""Networks and what surrounds them: architectures, debiasing fronts, heads, teachers, export."""
