// Operations on volumes [T, H, W, C].
