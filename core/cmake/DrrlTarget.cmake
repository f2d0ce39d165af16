# drrl_add_library(NAME core SOURCES ... [PUBLIC libs] [PRIVATE libs]): one library a folder, target
# drrl_NAME, alias drrl::NAME, all with the same warnings, precompiled header and install rules.
add_library(drrl_warnings INTERFACE)
set(drrl_warning_options -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Wold-style-cast
    -Woverloaded-virtual)
target_compile_options(drrl_warnings INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:${drrl_warning_options}>"
  $<$<AND:$<BOOL:${DRRL_WERROR}>,$<COMPILE_LANGUAGE:CXX>>:-Werror>)

set(DRRL_PRECOMPILED_HEADERS
    <ATen/ATen.h> <torch/csrc/autograd/custom_function.h> <torch/csrc/autograd/autograd.h>
    <algorithm> <filesystem> <functional> <map> <memory> <optional> <string> <vector>)

# The target drrl_headers_alone compiles each header of a library by itself: what it uses it
# includes.
add_custom_target(drrl_headers_alone)

function(drrl_check_headers library)
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR} *.h)
  if(NOT DRRL_WITH_CUDA)
    list(FILTER headers EXCLUDE REGEX "/(cuda|nccl)/")
  endif()
  if(NOT DRRL_MPI)
    list(FILTER headers EXCLUDE REGEX "/mpi/")
  endif()
  set(sources)
  foreach(header ${headers})
    set(source ${CMAKE_BINARY_DIR}/headers/${header}.cpp)
    file(CONFIGURE OUTPUT ${source} CONTENT "#include \"${header}\"\n" @ONLY)
    list(APPEND sources ${source})
  endforeach()
  if(NOT sources)
    return()
  endif()
  set(target drrl_${library}_headers)
  add_library(${target} OBJECT EXCLUDE_FROM_ALL ${sources})
  target_link_libraries(${target} PRIVATE drrl_${library} drrl_warnings)
  if(DRRL_WITH_CUDA)
    target_link_libraries(${target} PRIVATE drrl_nccl)
  endif()
  add_dependencies(drrl_headers_alone ${target})
endfunction()

function(drrl_add_library)
  cmake_parse_arguments(ARG "" "NAME" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  set(target drrl_${ARG_NAME})
  add_library(${target} ${ARG_SOURCES})
  add_library(drrl::${ARG_NAME} ALIAS ${target})
  set_target_properties(${target} PROPERTIES
    DEFINE_SYMBOL ""
    EXPORT_NAME ${ARG_NAME}
    OUTPUT_NAME drrl_${ARG_NAME})
  target_include_directories(${target} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>
                                              $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/drrl>)
  target_link_libraries(${target}
    PUBLIC ${ARG_PUBLIC}
    PRIVATE ${ARG_PRIVATE} $<BUILD_INTERFACE:drrl_warnings>)
  target_compile_features(${target} PUBLIC cxx_std_20)
  if(ARG_NAME STREQUAL core)
    target_precompile_headers(${target} PRIVATE ${DRRL_PRECOMPILED_HEADERS})
  else()
    target_precompile_headers(${target} REUSE_FROM drrl_core)
  endif()
  drrl_check_headers(${ARG_NAME})
  install(TARGETS ${target} EXPORT drrlTargets)
  install(DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}/
          DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/drrl/${ARG_NAME}
          FILES_MATCHING PATTERN "*.h")
endfunction()
