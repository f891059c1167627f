"""A hub Space with the page of agra demo."""

import agra

demo = agra.make_demo()

if __name__ == "__main__":
    demo.launch()
