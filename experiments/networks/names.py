"""What the networks are called in reports."""

NETWORK_NAMES = {
    'lenet300': 'LeNet-300-100',
    'lenet5': 'LeNet-5',
    'alexnet': 'AlexNet',
    'vgg16': 'VGG-16',
    'resnet': 'ResNet',
    'gpt': 'GPT',
}
