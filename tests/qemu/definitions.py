"""Documents that the tests of definitions share."""

from __future__ import annotations

# What virt-manager of Debian 12 makes of Debian 12, as `virsh dumpxml --inactive` shows it.
VIRT_MANAGER = """\
<domain type='kvm'>
  <name>debian12</name>
  <uuid>1b4f2a53-6f0e-4d4e-9e7b-1c7a3f8f0a11</uuid>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://debian.org/debian/12"/>
    </libosinfo:libosinfo>
  </metadata>
  <memory unit='KiB'>2097152</memory>
  <currentMemory unit='KiB'>2097152</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <boot dev='hd'/>
  </os>
  <features>
    <acpi/>
    <apic/>
    <vmport state='off'/>
  </features>
  <cpu mode='host-passthrough' check='none' migratable='on'/>
  <clock offset='utc'>
    <timer name='rtc' tickpolicy='catchup'/>
    <timer name='pit' tickpolicy='delay'/>
    <timer name='hpet' present='no'/>
  </clock>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <pm>
    <suspend-to-mem enabled='no'/>
    <suspend-to-disk enabled='no'/>
  </pm>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/var/lib/libvirt/images/debian12.qcow2'/>
      <target dev='vda' bus='virtio'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/>
      <target dev='sda' bus='sata'/>
      <readonly/>
      <address type='drive' controller='0' bus='0' target='0' unit='0'/>
    </disk>
    <controller type='usb' index='0' model='qemu-xhci' ports='15'>
      <address type='pci' domain='0x0000' bus='0x02' slot='0x00' function='0x0'/>
    </controller>
    <controller type='pci' index='0' model='pcie-root'/>
    <controller type='pci' index='1' model='pcie-root-port'>
      <model name='pcie-root-port'/>
      <target chassis='1' port='0x10'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x0' multifunction='on'/>
    </controller>
    <controller type='pci' index='2' model='pcie-root-port'>
      <model name='pcie-root-port'/>
      <target chassis='2' port='0x11'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x1'/>
    </controller>
    <controller type='pci' index='3' model='pcie-root-port'>
      <model name='pcie-root-port'/>
      <target chassis='3' port='0x12'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x2'/>
    </controller>
    <controller type='pci' index='4' model='pcie-root-port'>
      <model name='pcie-root-port'/>
      <target chassis='4' port='0x13'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x3'/>
    </controller>
    <controller type='sata' index='0'>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x1f' function='0x2'/>
    </controller>
    <controller type='virtio-serial' index='0'>
      <address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x0'/>
    </controller>
    <interface type='network'>
      <mac address='52:54:00:6b:3c:58'/>
      <source network='default'/>
      <model type='virtio'/>
      <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
    </interface>
    <serial type='pty'>
      <target type='isa-serial' port='0'>
        <model name='isa-serial'/>
      </target>
    </serial>
    <console type='pty'>
      <target type='serial' port='0'/>
    </console>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
      <address type='virtio-serial' controller='0' bus='0' port='1'/>
    </channel>
    <channel type='spicevmc'>
      <target type='virtio' name='com.redhat.spice.0'/>
      <address type='virtio-serial' controller='0' bus='0' port='2'/>
    </channel>
    <input type='tablet' bus='usb'>
      <address type='usb' bus='0' port='1'/>
    </input>
    <input type='mouse' bus='ps2'/>
    <input type='keyboard' bus='ps2'/>
    <graphics type='spice' autoport='yes'>
      <listen type='address'/>
      <image compression='off'/>
    </graphics>
    <sound model='ich9'>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x1b' function='0x0'/>
    </sound>
    <audio id='1' type='spice'/>
    <video>
      <model type='virtio' heads='1' primary='yes'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x01' function='0x0'/>
    </video>
    <redirdev bus='usb' type='spicevmc'>
      <address type='usb' bus='0' port='2'/>
    </redirdev>
    <redirdev bus='usb' type='spicevmc'>
      <address type='usb' bus='0' port='3'/>
    </redirdev>
    <memballoon model='virtio'>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x03' function='0x0'/>
    </memballoon>
    <rng model='virtio'>
      <backend model='random'>/dev/urandom</backend>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x04' function='0x0'/>
    </rng>
  </devices>
</domain>
"""

# What virt-manager's guest has that is not carried out: exactly this.
VIRT_MANAGER_IGNORED = (
    "features/vmport",
    "pm",
    "devices/interface",
    "devices/channel[2]",
    "devices/input[1]",
    "devices/input[2]",
    "devices/input[3]",
    "devices/graphics",
    "devices/sound",
    "devices/audio",
    "devices/redirdev[1]",
    "devices/redirdev[2]",
)

# Everything that is carried out, at least once.
EVERYTHING = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>all-1</name>
  <uuid>1b4f2a53-6f0e-4d4e-9e7b-1c7a3f8f0a11</uuid>
  <title>Everything</title>
  <memory unit='MiB'>256</memory>
  <currentMemory unit='MiB'>256</currentMemory>
  <vcpu>4</vcpu>
  <iothreads>3</iothreads>
  <cpu mode='custom' match='exact'>
    <model fallback='allow'>qemu64</model>
    <topology sockets='1' dies='1' cores='2' threads='2'/>
    <feature policy='require' name='sse4.2'/>
    <feature policy='disable' name='svm'/>
  </cpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <loader readonly='yes' secure='yes' type='pflash'>/fw/code.fd</loader>
    <nvram template='/fw/vars.tmpl'>/fw/vars.fd</nvram>
    <kernel>/boot/vmlinuz</kernel>
    <initrd>/boot/initrd</initrd>
    <cmdline>console=ttyS0 a,b=c</cmdline>
    <bootmenu enable='yes'/>
  </os>
  <features><acpi/><smm state='on'/></features>
  <clock offset='localtime'/>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap' detect_zeroes='unmap' iothread='1'/>
      <source file='/img/a, b=c.qcow2'/>
      <target dev='vda' bus='virtio'/>
      <iotune>
        <total_bytes_sec>1000000</total_bytes_sec>
        <total_bytes_sec_max>2000000</total_bytes_sec_max>
        <total_bytes_sec_max_length>60</total_bytes_sec_max_length>
        <read_iops_sec>100</read_iops_sec>
      </iotune>
      <blockio logical_block_size='4096' physical_block_size='8192'/>
      <serial>WD-1 a_b.c+d</serial>
      <boot order='1'/>
      <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw' cache='writethrough'/>
      <source dev='/dev/vg/b'/>
      <target dev='sda' bus='scsi'/>
      <readonly/>
      <address type='drive' controller='1' bus='0' target='3' unit='2'/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw' io='io_uring'/>
      <source protocol='nbd' name='exp/ort'><host name='::1' port='10810'/></source>
      <target dev='sdb' bus='sata'/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source protocol='nbd' name='e'><host transport='unix' socket='/run/a b,c=d?.sock'/></source>
      <target dev='sdc' bus='usb'/>
    </disk>
    <disk type='file' device='disk'>
      <source file='/img/nvme'/>
      <target dev='nvme0n1' bus='nvme'/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sdd' bus='sata'/>
      <boot order='2'/>
    </disk>
    <controller type='pci' index='0' model='pcie-root'/>
    <controller type='pci' index='1' model='pcie-root-port'>
      <target chassis='7' port='0x8'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x06' function='0x0'/>
    </controller>
    <controller type='scsi' index='1' model='virtio-scsi'>
      <driver iothread='2'/>
    </controller>
    <interface type='user'>
      <mac address='52:54:00:00:00:01'/>
      <model type='e1000e'/>
      <boot order='3'/>
    </interface>
    <interface type='ethernet'>
      <target dev='tap-1' managed='no'/>
      <model type='virtio'/>
    </interface>
    <interface type='bridge'>
      <source bridge='br0'/>
    </interface>
    <serial type='file'><source path='/log/a,b=c'/></serial>
    <serial type='unix'><source mode='bind' path='/run/s,1'/></serial>
    <console type='pty'><target type='virtio'/></console>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='unix'>
      <source mode='connect' path='/run/c'/>
      <target type='virtio' name='org.example.c'/>
    </channel>
    <graphics type='vnc' port='5903' listen='::1'/>
    <graphics type='vnc'><listen type='socket' socket='/run/v,nc'/></graphics>
    <video><model type='cirrus'/></video>
    <rng model='virtio'><backend model='random'>/dev/random</backend></rng>
    <memballoon model='virtio'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-device'/>
    <qemu:arg value='edu'/>
    <qemu:env name='A_B' value='c d'/>
  </qemu:commandline>
</domain>
"""


def guest(devices: str = "", *, os: str = "", more: str = "", machine: str = "q35") -> str:
    """A small guest with these devices."""
    return (
        "<domain type='qemu'><name>g</name><memory unit='MiB'>64</memory>"
        f"<os><type machine='{machine}'>hvm</type>{os}</os>{more}<devices>{devices}</devices></domain>"
    )


def disk(target: str = "vda", more: str = "", *, source: str = "/a", driver: str = "", attributes: str = "") -> str:
    """A disk, on a file; without a bus in its target."""
    image = f"<source file='{source}'/>" if source else ""
    plugged = f"<target {target}/>" if "=" in target else f"<target dev='{target}'/>"
    return f"<disk {attributes}><driver {driver}/>{image}{plugged}{more}</disk>"
