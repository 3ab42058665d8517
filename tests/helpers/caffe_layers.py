"""The layers of Caffe in NumPy, from its documentation, and two networks of its model zoo.

An image is (channel, height, width), blobs are laid out as in a `.caffemodel`; all is computed in
float64. Colours are in whatever order the blobs want them.
"""

import math

import numpy as np


def convolve(image, weight, bias, stride=1, pad=0, groups=1):
    outputs, inputs, rows, columns = weight.shape
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    height, width = (
        (padded.shape[1] - rows) // stride + 1,
        (padded.shape[2] - columns) // stride + 1,
    )
    found = np.zeros((outputs, height, width)) + bias[:, None, None]
    for output in range(outputs):
        first = output // (outputs // groups) * inputs
        for row, column in np.ndindex(rows, columns):
            patch = padded[
                first : first + inputs,
                row : row + (height - 1) * stride + 1 : stride,
                column : column + (width - 1) * stride + 1 : stride,
            ]
            found[output] += np.tensordot(weight[output, :, row, column].astype(float), patch, 1)
    return found


def pool(image, size, stride):
    """The maximum over windows; those at the border see the part of the image that there is."""
    height, width = (math.ceil((n - size) / stride) + 1 for n in image.shape[1:])
    found = np.zeros((len(image), height, width))
    for row, column in np.ndindex(height, width):
        top, left = row * stride, column * stride
        found[:, row, column] = image[:, top : top + size, left : left + size].max((1, 2))
    return found


def normalize(image, size=5, alpha=1e-4, beta=0.75):
    """Each value over (1 + α / n · Σ x²)^β, the sum over n channels around its own."""
    found = np.zeros(image.shape)
    for channel in range(len(image)):
        around = image[max(0, channel - size // 2) : channel + size // 2 + 1]
        found[channel] = image[channel] / (1 + alpha / size * (around**2).sum(0)) ** beta
    return found


def relu(values):
    return np.maximum(values, 0)


def product(values, weight, bias, transpose=False):
    """Weights are (output, input), or (input, output) where they are transposed."""
    weight, values = weight.astype(float), values.reshape(-1)
    return (values @ weight if transpose else weight @ values) + bias


def classify(blobs, hidden):
    hidden = relu(product(hidden, *blobs['fc6']))
    hidden = relu(product(hidden, *blobs['fc7']))
    return product(hidden, *blobs['fc8'])


def alexnet(blobs, image):
    """The logits of `bvlc_alexnet`.

    Args:
      blobs: weight and bias of each layer by its name.
      image: (channel, height, width).
    """
    hidden = relu(convolve(image, *blobs['conv1'], stride=4))
    hidden = pool(normalize(hidden), 3, 2)
    hidden = relu(convolve(hidden, *blobs['conv2'], pad=2, groups=2))
    hidden = pool(normalize(hidden), 3, 2)
    hidden = relu(convolve(hidden, *blobs['conv3'], pad=1))
    hidden = relu(convolve(hidden, *blobs['conv4'], pad=1, groups=2))
    hidden = relu(convolve(hidden, *blobs['conv5'], pad=1, groups=2))
    return classify(blobs, pool(hidden, 3, 2))


def vgg16(blobs, image):
    """The logits of `VGG_ILSVRC_16_layers`; arguments as of `alexnet`."""
    hidden = image
    for block, layers in enumerate((2, 2, 3, 3, 3), start=1):
        for layer in range(1, layers + 1):
            hidden = relu(convolve(hidden, *blobs[f'conv{block}_{layer}'], pad=1))
        hidden = pool(hidden, 2, 2)
    return classify(blobs, hidden)
