// The module shira_kernels._C. Importing it registers the C++ kernels; what it offers itself are facts and the choice
// of the instruction set. It uses Python's limited API (setup.py has Py_LIMITED_API defined), so one build serves every
// Python from 3.10 on.
#include <Python.h>
#include <torch/headeronly/version.h>

#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa_choice.h"
#include "cpu/split.h"
#include "cuda/facts.h"

namespace shira {
namespace {

struct PythonError {};  // thrown where Python has set its own error

PyObject* checked(PyObject* object) {
  if (object == nullptr) throw PythonError();
  return object;
}

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

PyObject* to_python(int64_t number) { return checked(PyLong_FromLongLong(number)); }

PyObject* to_python(const std::string& text) {
  return checked(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}

PyObject* to_python(const std::vector<std::string>& names) {
  Owned list(checked(PyList_New(0)));
  for (const std::string& name : names) {
    if (PyList_Append(list.get(), Owned(to_python(name)).get()) != 0) throw PythonError();
  }
  return list.release();
}

template <class Value>
PyObject* to_python(const std::map<std::string, Value>& facts) {
  Owned dict(checked(PyDict_New()));
  for (const auto& [name, value] : facts) {
    if (PyDict_SetItemString(dict.get(), name.c_str(), Owned(to_python(value)).get()) != 0) throw PythonError();
  }
  return dict.release();
}

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

template <class... Values>
void parse(PyObject* arguments, const char* format, Values*... values) {
  if (!PyArg_ParseTuple(arguments, format, values...)) throw PythonError();
}

// A function as Python calls it: what `body` throws becomes Python's error.
template <PyObject* (*body)(PyObject* arguments)>
PyObject* call(PyObject* /* the module */, PyObject* arguments) {
  try {
    return body(arguments);
  } catch (const PythonError&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A function without arguments that gives what `fact` does.
template <auto fact>
PyObject* give(PyObject* /* no arguments */) {
  return to_python(fact());
}

std::string isa() { return cpu_kernels().name; }

std::map<std::string, std::string> build_facts() {
  return {
      {"compiler", __VERSION__},
      {"torch headers", TORCH_VERSION},
#ifdef SHIRA_CUDA_ARCHITECTURES
      {"cuda architectures", SHIRA_CUDA_ARCHITECTURES},
#endif
  };
}

PyObject* choose_isa(PyObject* arguments) {
  const char* name;
  parse(arguments, "s:set_isa", &name);
  set_isa(name);
  return none();
}

PyObject* choose_check_indices(PyObject* arguments) {
  int enabled;
  parse(arguments, "p:set_check_indices", &enabled);
  set_check_indices(enabled != 0);
  return none();
}

PyObject* find_next_line(PyObject* arguments) {
  PyObject* list;
  long long i, element_size;
  unsigned long long address;
  parse(arguments, "O!LKL:next_line", &PyList_Type, &list, &i, &address, &element_size);
  std::vector<int64_t> indices;
  for (Py_ssize_t at = 0; at < PyList_Size(list); ++at) {
    indices.push_back(PyLong_AsLongLong(PyList_GetItem(list, at)));
    if (PyErr_Occurred()) throw PythonError();
  }
  return to_python(next_line(i, 0, static_cast<int64_t>(indices.size()), address, element_size,
                             [&](int64_t at) { return indices[at]; }));
}

PyObject* find_line_begin(PyObject* arguments) {
  long long position, element_size;
  unsigned long long address;
  parse(arguments, "LKL:line_begin", &position, &address, &element_size);
  return to_python(line_begin(position, address, element_size));
}

PyMethodDef functions[] = {
    {"runnable_isas", call<give<runnable_isas>>, METH_NOARGS,
     "Instruction sets with kernels that this processor runs, the best last."},
    {"isa", call<give<isa>>, METH_NOARGS, "The instruction set in use."},
    {"set_isa", call<choose_isa>, METH_VARARGS,
     "Chooses the instruction set; ValueError if this processor does not run it."},
    {"calls_by_isa", call<give<calls_by_isa>>, METH_NOARGS,
     "How many op calls each instruction set has run in this process."},
    {"next_line", call<find_next_line>, METH_VARARGS,
     "Where a thread's share that nominally begins at entry i of a list begins (indices, i, address, element size); "
     "for "
     "tests."},
    {"line_begin", call<find_line_begin>, METH_VARARGS,
     "The first position that begins a cache line, from one on (position, address, element size); for tests."},
    {"cuda_ops", call<give<cuda_ops>>, METH_NOARGS, "Ops with a CUDA C++ kernel in this build."},
    {"cuda_calls", call<give<cuda_calls>>, METH_NOARGS, "How many op calls CUDA C++ kernels have run in this process."},
    {"set_check_indices", call<choose_check_indices>, METH_VARARGS,
     "Whether CUDA C++ kernels check indices first, which waits."},
    {"build_facts", call<give<build_facts>>, METH_NOARGS, "The compiler and the torch of this build."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "shira_kernels._C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace shira

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&shira::module); }
