// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 without a GPU: what Triton asks of it succeeds, and launches are remembered as a
// GPU would get them. It refuses what a driver refuses of Triton: see `cuLaunchKernelEx`.

#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEVICES 4
#define PARAMETERS 512
#define LAUNCHES 64

typedef struct {
  char name[128];
  int device; // whose current context it was loaded in, -1 once it is unloaded
  unsigned most_shared, count;
  struct { unsigned offset, size; } parameters[PARAMETERS];
} Program;

typedef struct {
  Program *program;
  CUstream stream;
  unsigned grid[3], block[3], shared, attributes;
  unsigned char bytes[4096]; // of the parameters, at the offsets where the program reads them
} Launch;

// Set and read from outside. Launches past the last are made, and forgotten.
int stub_current = 0, stub_shared_memory[DEVICES];
unsigned stub_count = 0;
Launch stub_launches[LAUNCHES];

// A program's parameters, as the assembler has noted them for the driver in ".nv.info.<name>".
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const char *at = image;
  const Elf64_Ehdr *head = image;
  const Elf64_Shdr *sections = (const void *)(at + head->e_shoff);
  const char *names = at + sections[head->e_shstrndx].sh_offset;
  Program *program = calloc(1, sizeof(Program));
  program->device = stub_current;
  program->most_shared = 48 << 10;
  for (int i = 0; i < head->e_shnum; ++i) {
    const char *name = names + sections[i].sh_name;
    if (strncmp(name, ".nv.info.", 9))
      continue;
    snprintf(program->name, sizeof(program->name), "%s", name + 9);
    const unsigned char *note = (const void *)(at + sections[i].sh_offset);
    const unsigned char *end = note + sections[i].sh_size;
    while (note < end) {
      uint16_t size = 0, place[2];
      if (note[0] == 4) // a format with a value of so many bytes
        memcpy(&size, note + 2, 2);
      if (note[0] == 4 && note[1] == 0x17) { // KPARAM_INFO: -, ordinal and offset, flags and size
        uint32_t flags;
        memcpy(place, note + 8, 4);
        memcpy(&flags, note + 12, 4);
        program->parameters[place[0]].offset = place[1];
        program->parameters[place[0]].size = flags >> 18;
        program->count = place[0] >= program->count ? place[0] + 1u : program->count;
      }
      note += 4 + size;
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
  ((Program *)module)->device = -1;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  Program *program = (Program *)function;
  if (program->device != stub_current)
    return CUDA_ERROR_INVALID_HANDLE; // of another context, or of none any more
  if (config->sharedMemBytes > program->most_shared)
    return CUDA_ERROR_INVALID_VALUE;
  if (stub_count < LAUNCHES) {
    Launch *launch = &stub_launches[stub_count++];
    memset(launch, 0, sizeof(Launch));
    launch->program = program;
    launch->stream = config->hStream;
    memcpy(launch->grid, &config->gridDimX, sizeof(launch->grid));
    memcpy(launch->block, &config->blockDimX, sizeof(launch->block));
    launch->shared = config->sharedMemBytes;
    launch->attributes = config->numAttrs;
    for (unsigned i = 0; i < program->count; ++i)
      memcpy(launch->bytes + program->parameters[i].offset, parameters[i],
             program->parameters[i].size);
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return CUDA_ERROR_INVALID_VALUE;
  ((Program *)function)->most_shared = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
               ? stub_shared_memory[device]
               : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  static char said[32];
  snprintf(said, sizeof(said), "error %d", error);
  *text = said;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)(uintptr_t)(stub_current + 1);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult done(void) { return CUDA_SUCCESS; }
CUresult never(void) { return CUDA_ERROR_NOT_SUPPORTED; }

// Triton links to these, but has no reason to call them: a context is always current.
#define AS(name, what) __typeof__(name) name __attribute__((alias(#what)))
AS(cuFuncSetCacheConfig, done);
AS(cuInit, never);
AS(cuDriverGetVersion, never);
AS(cuDevicePrimaryCtxRetain, never);
AS(cuCtxSetCurrent, never);
AS(cuCtxGetDevice, never);
AS(cuCtxGetLimit, never);
AS(cuCtxSetLimit, never);
AS(cuStreamIsCapturing, never);
