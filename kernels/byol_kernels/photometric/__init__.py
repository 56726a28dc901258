"""Color jitter, grayscale, blur, solarize, flip, normalize and cast of uint8 images."""
