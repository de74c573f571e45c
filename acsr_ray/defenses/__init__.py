"""Image transforms proposed as defences, under one interface; none of them needs the method's own parts."""
