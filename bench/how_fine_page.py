def write(*args):
    print("page later")
