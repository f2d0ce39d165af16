# Installs BUILD into an empty prefix, builds EXAMPLE against it in WORK, and runs two processes of
# it; then what Python programs load.
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ECHO STDOUT RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "exit ${result}: ${ARGV}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
run(${CMAKE_COMMAND} -G Ninja -S ${EXAMPLE} -B ${WORK}/build
    -DCMAKE_PREFIX_PATH=${WORK}/prefix -DDRRL_PYTHON=${DRRL_PYTHON} -DCMAKE_BUILD_TYPE=Release)
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${LAUNCHER} -np 2 ${WORK}/build/train)

file(GLOB library ${WORK}/prefix/lib*/libdrrl_torch_ops.so)
string(CONCAT program "import drrl_attention\n"
  "print(drrl_attention.register('${library}', head_dim=64, rank=32).describe())")
run(${CMAKE_COMMAND} -E env PYTHONPATH=${WORK}/prefix/share/drrl ${DRRL_PYTHON} -c "${program}")
