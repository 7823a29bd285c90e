"""Image classifiers on folders of pictures: accuracy, speed and cost of methods inside them"""
