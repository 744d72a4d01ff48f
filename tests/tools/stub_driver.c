// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 without a GPU: what Triton asks of it succeeds, and launches are remembered as a
// GPU would get them. Refused are launches that a driver refuses too (`cuLaunchKernelEx`).

#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAUNCHES 64

typedef struct {
  char name[128];
  int device; // whose context it was loaded in; -1 once it is unloaded
  unsigned most_shared, count;
  struct { unsigned offset, size; } parameters[1024];
} Program;

typedef struct {
  Program *program;
  CUstream stream;
  unsigned grid[3], block[3], shared, attributes;
  unsigned char parameters[4096]; // at the offsets where the program reads them
} Launch;

// Set and read from outside. Launches past the last are made, and forgotten.
int stub_current = 0, stub_shared_memory[4];
unsigned stub_count = 0;
Launch stub_launches[LAUNCHES];

// Finds the parameters as the assembler has noted them for the driver, in ".nv.info.<name>".
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const char *start = image;
  const Elf64_Ehdr *head = image;
  const Elf64_Shdr *sections = (const void *)(start + head->e_shoff);
  Program *program = calloc(1, sizeof(Program));
  program->device = stub_current;
  program->most_shared = 48 << 10;
  for (int i = 0; i < head->e_shnum; ++i) {
    const char *name = start + sections[head->e_shstrndx].sh_offset + sections[i].sh_name;
    if (strncmp(name, ".nv.info.", 9))
      continue;
    snprintf(program->name, sizeof(program->name), "%s", name + 9);
    const char *note = start + sections[i].sh_offset, *end = note + sections[i].sh_size;
    uint16_t size;
    for (; note < end; note += 4 + size) {
      memcpy(&size, note + 2, 2);
      if (note[0] != 4) // of another format: those two bytes are the value itself
        size = 0;
      else if (note[1] == 0x17) { // KPARAM_INFO
        struct { uint32_t index; uint16_t ordinal, offset; uint32_t flags; } found;
        memcpy(&found, note + 4, sizeof(found));
        program->parameters[found.ordinal].offset = found.offset;
        program->parameters[found.ordinal].size = found.flags >> 18;
        if (program->count <= found.ordinal)
          program->count = found.ordinal + 1;
      }
    }
  }
  *module = (CUmodule)program;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return strcmp(((Program *)module)->name, name) ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  return ((Program *)module)->device = -1, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  Program *program = (Program *)function;
  if (program->device != stub_current)
    return CUDA_ERROR_INVALID_HANDLE;
  if (config->sharedMemBytes > program->most_shared)
    return CUDA_ERROR_INVALID_VALUE;
  if (stub_count == LAUNCHES)
    return CUDA_SUCCESS;
  Launch *launch = &stub_launches[stub_count++];
  *launch = (Launch){
      program, config->hStream,
      {config->gridDimX, config->gridDimY, config->gridDimZ},
      {config->blockDimX, config->blockDimY, config->blockDimZ},
      config->sharedMemBytes, config->numAttrs, {0},
  };
  for (unsigned i = 0; i < program->count; ++i)
    memcpy(launch->parameters + program->parameters[i].offset, parameters[i],
           program->parameters[i].size);
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return CUDA_ERROR_INVALID_VALUE;
  ((Program *)function)->most_shared = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  const int most = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
  return *value = most ? stub_shared_memory[device] : 0, CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  const int foreign = error == CUDA_ERROR_INVALID_HANDLE;
  return *text = foreign ? "a program of another context" : "refused", CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { // there always is one
  return *context = (CUcontext)(uintptr_t)(stub_current + 1), CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// Triton links to these as well, and has no reason to call them.
CUresult unasked(void) { return CUDA_ERROR_NOT_SUPPORTED; }
#define UNASKED(name) __typeof__(name) name __attribute__((alias("unasked")))
UNASKED(cuInit); UNASKED(cuDriverGetVersion); UNASKED(cuStreamIsCapturing);
UNASKED(cuDevicePrimaryCtxRetain); UNASKED(cuCtxSetCurrent); UNASKED(cuCtxGetDevice);
UNASKED(cuCtxGetLimit); UNASKED(cuCtxSetLimit);
