# Finds what drrl links against and says what it found. Shared by drrl's own build and by
# drrlConfig.cmake.
#
# LibTorch is taken from the `torch` wheel (or a LibTorch archive) without its TorchConfig.cmake:
# that file refuses a CUDA wheel on a machine without a CUDA toolkit and needs a removed CUDA target
# on toolkits from 13 on, while all drrl needs is the include folders and three libraries.
#   DRRL_TORCH_ROOT   the folder holding include/ and lib/ of torch; by default asked of `python3`
#                     (or DRRL_PYTHON)
#   DRRL_MPI          ON unless set: Open MPI is needed; OFF: built without
# Sets DRRL_WITH_CUDA, DRRL_PYTHON and the imported targets drrl_torch, with DRRL_MPI MPI::MPI_CXX,
# with CUDA CUDA::* and drrl_nccl.

set(DRRL_PYTHON "" CACHE FILEPATH "Python that has the torch package")
if(NOT DRRL_PYTHON)
  find_program(DRRL_PYTHON_FOUND NAMES python3)
  set(DRRL_PYTHON ${DRRL_PYTHON_FOUND} CACHE FILEPATH "" FORCE)
endif()

set(DRRL_TORCH_ROOT "" CACHE PATH "Folder with include/ and lib/ of LibTorch")
if(NOT DRRL_TORCH_ROOT AND DRRL_PYTHON)
  string(CONCAT _find_torch "import importlib.util as u; "
                            "print(u.find_spec('torch').submodule_search_locations[0])")
  execute_process(COMMAND ${DRRL_PYTHON} -c "${_find_torch}"
                  OUTPUT_VARIABLE _torch_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
                  RESULT_VARIABLE _torch_failed)
  if(NOT _torch_failed)
    set(DRRL_TORCH_ROOT ${_torch_root} CACHE PATH "" FORCE)
  endif()
endif()
if(NOT EXISTS "${DRRL_TORCH_ROOT}/include/ATen/ATen.h")
  message(FATAL_ERROR
          "drrl: no LibTorch in '${DRRL_TORCH_ROOT}' (expected include/ATen/ATen.h). "
          "Set DRRL_TORCH_ROOT, or DRRL_PYTHON to a Python that has torch "
          "(launch/setup/environment.sh makes one).")
endif()
file(STRINGS "${DRRL_TORCH_ROOT}/include/torch/headeronly/version.h" _torch_version
     REGEX "^ +\"[0-9.]+\"$")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" DRRL_TORCH_VERSION "${_torch_version}")

# CUDA: a toolkit and a LibTorch that has CUDA.
set(DRRL_WITH_CUDA OFF)
if(NOT DEFINED DRRL_CUDA)
  set(DRRL_CUDA AUTO)
endif()
if(NOT DRRL_CUDA STREQUAL OFF)
  find_package(CUDAToolkit QUIET)
  find_path(DRRL_NCCL_INCLUDE nccl.h
            HINTS ${CUDAToolkit_INCLUDE_DIRS} ${DRRL_TORCH_ROOT}/../nvidia/nccl/include)
  find_library(DRRL_NCCL_LIBRARY NAMES nccl libnccl.so.2
               HINTS ${CUDAToolkit_LIBRARY_DIR} ${DRRL_TORCH_ROOT}/../nvidia/nccl/lib)
  if(CUDAToolkit_FOUND AND DRRL_NCCL_INCLUDE AND DRRL_NCCL_LIBRARY AND
     EXISTS "${DRRL_TORCH_ROOT}/lib/libtorch_cuda.so")
    set(DRRL_WITH_CUDA ON)
  elseif(DRRL_CUDA STREQUAL ON)
    message(FATAL_ERROR
            "drrl: DRRL_CUDA=ON, but CUDA toolkit: '${CUDAToolkit_VERSION}', "
            "nccl.h: '${DRRL_NCCL_INCLUDE}', libnccl: '${DRRL_NCCL_LIBRARY}', "
            "libtorch_cuda.so in '${DRRL_TORCH_ROOT}/lib' (each is needed)")
  endif()
endif()

if(NOT TARGET drrl_torch)
  add_library(drrl_torch INTERFACE IMPORTED GLOBAL)
  set_target_properties(drrl_torch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES
      "${DRRL_TORCH_ROOT}/include;${DRRL_TORCH_ROOT}/include/torch/csrc/api/include"
    INTERFACE_COMPILE_DEFINITIONS "USE_DISTRIBUTED")
  set(_torch_libraries ${DRRL_TORCH_ROOT}/lib/libtorch_cpu.so ${DRRL_TORCH_ROOT}/lib/libc10.so)
  if(DRRL_WITH_CUDA)
    # Nothing refers to libtorch_cuda by symbol, yet it must be loaded to register its kernels.
    list(APPEND _torch_libraries
         -Wl,--no-as-needed ${DRRL_TORCH_ROOT}/lib/libtorch_cuda.so -Wl,--as-needed
         ${DRRL_TORCH_ROOT}/lib/libc10_cuda.so CUDA::cudart CUDA::cusolver)
    set_property(TARGET drrl_torch APPEND PROPERTY
                 INTERFACE_COMPILE_DEFINITIONS USE_C10D_NCCL DRRL_WITH_CUDA)
    set_property(TARGET drrl_torch APPEND PROPERTY
                 INTERFACE_INCLUDE_DIRECTORIES ${CUDAToolkit_INCLUDE_DIRS})
  endif()
  set_property(TARGET drrl_torch PROPERTY INTERFACE_LINK_LIBRARIES ${_torch_libraries})
  # at::parallel_for is a header: without OpenMP in the including file it runs on one thread,
  # silently.
  set_property(TARGET drrl_torch PROPERTY
               INTERFACE_COMPILE_OPTIONS $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
  # Executables find the wheel's own OpenMP and CUDA libraries through it.
  set_property(TARGET drrl_torch PROPERTY INTERFACE_LINK_OPTIONS
               -fopenmp
               "-Wl,-rpath,${DRRL_TORCH_ROOT}/lib"
               "-Wl,-rpath-link,${DRRL_TORCH_ROOT}/lib")
  if(DRRL_WITH_CUDA)
    add_library(drrl_nccl INTERFACE IMPORTED GLOBAL)
    set_target_properties(drrl_nccl PROPERTIES INTERFACE_INCLUDE_DIRECTORIES ${DRRL_NCCL_INCLUDE}
                                               INTERFACE_LINK_LIBRARIES ${DRRL_NCCL_LIBRARY})
  endif()
endif()

find_package(Threads REQUIRED)
if(NOT DEFINED DRRL_MPI)
  set(DRRL_MPI ON)
endif()
set(_mpi "not used (DRRL_MPI=OFF)")
if(DRRL_MPI)
  set(MPI_CXX_SKIP_MPICXX ON)  # the C interface only
  find_package(MPI COMPONENTS CXX QUIET)
  if(NOT MPI_CXX_FOUND)
    message(FATAL_ERROR
            "drrl: no MPI was found. Install Open MPI (Debian: libopenmpi-dev openmpi-bin), "
            "or build without it: -DDRRL_MPI=OFF")
  endif()
  set(_mpi "${MPI_CXX_VERSION} (${MPI_CXX_LIBRARIES})")
endif()
if(DRRL_WITH_CUDA)
  set(_cuda "${CUDAToolkit_VERSION}, NCCL ${DRRL_NCCL_LIBRARY}, cuSOLVER")
else()
  set(_cuda "not used (DRRL_CUDA=${DRRL_CUDA})")
endif()
message(STATUS "drrl: LibTorch ${DRRL_TORCH_VERSION} in ${DRRL_TORCH_ROOT}")
message(STATUS "drrl: CUDA ${_cuda}")
message(STATUS "drrl: MPI standard ${_mpi}")
