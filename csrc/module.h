// Importing the extension runs its static registrations; the Python module itself is empty.
#pragma once
#include <Python.h>

#define QRM_FAST_EMPTY_MODULE(name)                                                \
  extern "C" PyObject* PyInit_##name() {                                           \
    static PyModuleDef def = {PyModuleDef_HEAD_INIT, #name, nullptr, -1, nullptr}; \
    return PyModule_Create(&def);                                                  \
  }
